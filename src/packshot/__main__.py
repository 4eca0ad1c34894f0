"""``python -m packshot <stage>``: the same as the console script."""

from packshot.cli import main

if __name__ == "__main__":
    main()
