"""Scripts that run in processes of their own, some under the Python of another tool. They import nothing of bdcli."""
