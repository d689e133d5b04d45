"""The command line: what a terminal and a file can say of the calls that users of Python make."""
