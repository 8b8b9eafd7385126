"""Privacy numbers by a second route, and attacks that bound epsilon from below.

`recompute`: sensitivity and epsilon again, by other mathematics than that of the claim.
`replay`: the file of a ledger against the participation, by other code than that which wrote it.
`attack`: runs of the real optimizer with and without a canary; `bounds`: what they prove.
"""
