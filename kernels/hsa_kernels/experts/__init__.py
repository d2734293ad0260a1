"""The mixture of experts: the router's choice, and the experts themselves."""
