"""`python -m bitdance`."""

from bitdance.cli.main import main

if __name__ == "__main__":
    main()
