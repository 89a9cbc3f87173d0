"""The host: blocks shared among threads, and what compiled loops are made with."""
