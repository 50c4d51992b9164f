"""Tables and figures of the results, and what the README shows of them."""
