"""What the compiled engine asks of the machine: vector code, memory, threads, and where its code is kept."""
