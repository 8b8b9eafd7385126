"""How good can any split of a workload be?"""
