"""What the paper (arXiv 2606.00144) reports, by data set and context."""

# (speedup, acceptance rate) at B = 2048 or the paper's best budget
PUBLISHED = {
    ("pg19", 4096): (5.31, 0.6798),
    ("longbench", 4096): (5.56, 0.6744),
    ("lwm", 4096): (6.55, 0.7937),
    ("pg19", 8192): (4.27, 0.5226),
    ("longbench", 8192): (2.13, 0.2043),
    ("lwm", 8192): (4.46, 0.5511),
    ("pg19", 16384): (1.22, 0.1881),
    ("longbench", 16384): (1.53, 0.2798),
    ("lwm", 16384): (2.10, 0.3417),
}
