"""One bounded pass of the teacher over a little text, which answers the requests of methods."""
