"""Reading a prompt: what torch's products of many rows leave to compiled code, on torch's own threads."""
