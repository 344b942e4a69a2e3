"""``python tests/derived.py FILE`` prints the mutants that follow from a kernel file, FILE as in `mutants.MUTANTS`."""

import sys

import mutants

if __name__ == "__main__":
    for mutant in mutants.derivable(sys.argv[1]):
        print(*mutant, sep="\t")
