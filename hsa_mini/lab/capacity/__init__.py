"""How many needles a chunk can hold before its landmark no longer finds each of them."""
