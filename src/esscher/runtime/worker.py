"""`python -m esscher.runtime.worker RUN`: bring one run folder to its end, in this process."""

import sys

from esscher.errors import UserError
from esscher.runtime.jobs import work
from esscher.runtime.run import Interrupted

if __name__ == "__main__":
    try:
        work(sys.argv[1])
    except UserError as error:
        sys.exit(f"esscher: {error}")
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(130)
