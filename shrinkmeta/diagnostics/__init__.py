"""Looking at a learner: is its gradient right, what has it found, how good is it?"""
