"""How limits are kept: in this process, by a file for one machine, or on a redis server."""
