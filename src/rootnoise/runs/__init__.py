"""How does a training run go, and what is in its folder?"""
