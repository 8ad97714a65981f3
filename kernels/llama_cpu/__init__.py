"""What a Llama's layers do between their matrix products, compiled for this CPU, forward and backward."""
