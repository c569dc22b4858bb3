"""How gradients become integers that can be summed, and back. Codecs know no transport."""
