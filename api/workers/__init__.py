"""Workers: who is alive, on which device, with which job."""
