"""rlhf: does this policy still reflect what people prefer, minorities included?"""

__version__ = "0.1.0"
