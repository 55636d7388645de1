"""python -m esscher.cli"""

from esscher.cli import main

if __name__ == "__main__":
    main()
