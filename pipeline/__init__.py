"""What a researcher need not read to use or change the training loop: files, devices, data, memory, pictures.

Nothing here imports the modules at the project's root; they import from here.
"""
