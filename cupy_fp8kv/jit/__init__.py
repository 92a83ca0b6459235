"""From a specialisation to a loaded kernel. Importing it reads the sources; CuPy comes in with the first kernel."""
