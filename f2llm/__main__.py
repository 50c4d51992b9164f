"""python -m f2llm <verb>"""

from .pipeline.cli import main

main()
