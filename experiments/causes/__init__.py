"""Why the method falls behind where it does: experiments whose right answer is known."""
