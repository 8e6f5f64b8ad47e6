"""The command line: options in, text and tables out. Heavy imports wait inside the commands."""
