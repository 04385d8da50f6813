"""From a trained supernet and a table of costs to a subnet."""
