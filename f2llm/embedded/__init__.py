"""The embedded default: text that ships inside packages, its records and tasks, and a small backbone made from it."""
