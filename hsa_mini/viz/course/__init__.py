"""The two pictures of the start page: the search for a needle, and the map of the course."""
