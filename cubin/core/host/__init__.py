"""What the loops on the host are made with."""
