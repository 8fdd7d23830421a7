"""`python -m etude`: the same as the `etude` command; what launchers start on every rank."""

import sys

from etude.cli import main

if __name__ == "__main__":
    # deepspeed's launcher puts --local_rank=N before the verb; the environment says it as well
    sys.argv[1:2] = [word for word in sys.argv[1:2] if not word.startswith("--local_rank=")]
    main()
