"""python -m f2llm <verb>"""

from .cli import main

main()
