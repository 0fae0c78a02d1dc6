"""What a grid will cost before it runs: its stages, their hours by measured rates, and why each would run."""
