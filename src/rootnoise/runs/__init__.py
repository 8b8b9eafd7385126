"""How is a training run carried out, and what is in its folder?"""
