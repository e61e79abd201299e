"""Search the hyperparameters of a Keras network: python study.py --n-trials 50"""

import sys

from search.cli import main

if __name__ == "__main__":
    sys.exit(main())
