"""blokern beside other libraries: the same work on the same inputs, results before times (`make bench-peers`)."""
