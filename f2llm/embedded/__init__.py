"""The embedded corpus: text that ships inside packages, as training records and as evaluation tasks."""
