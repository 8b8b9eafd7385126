"""Who is drawn for a step, and who was?"""
