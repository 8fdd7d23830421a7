"""Cases by family of operators: each file has `CASES`."""
