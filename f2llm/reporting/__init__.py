"""Tables and figures of the results, for the report, README.md and docs/."""
