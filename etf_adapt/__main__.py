"""The command line without its console script: ``python -m etf_adapt NAME``, ``accelerate launch -m etf_adapt NAME``."""

from etf_adapt.commands.main import main

if __name__ == "__main__":
    main()
