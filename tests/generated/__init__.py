"""Networks that no one wrote: drawn at random, pruned, and held against an oracle of their own.

``python -m tests.generated --count 10000`` goes through many; ``test_generated.py`` through a few.
"""
