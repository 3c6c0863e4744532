"""What a run would cost on hardware that is not there: memory, time, communication, price."""
