"""Tables, pictures and one HTML page of the results of runs."""
