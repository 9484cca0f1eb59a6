"""`python -m mmssl`, and `torchrun -m mmssl run ...` where several processes train."""

from mmssl.alive import end_with_launcher

if __name__ == "__main__":
    end_with_launcher()  # before what takes seconds to import

    from mmssl.cli import main

    main()
