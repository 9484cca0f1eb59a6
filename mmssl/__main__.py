"""`python -m mmssl`, and `torchrun -m mmssl run ...` where several processes train."""

from mmssl.cli import main

if __name__ == "__main__":
    main()
