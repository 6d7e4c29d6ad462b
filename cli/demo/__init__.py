"""What `make demo` needs beside the service: a real model, and text to calibrate on."""
