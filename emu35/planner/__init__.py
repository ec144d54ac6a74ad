"""What a configuration will need, computed before anything is started.

Everything is formula, from the configuration alone and without torch: ``parameters`` counts
weights, ``memory`` says what a rank must hold and names the source of each formula, ``plan`` puts
the answers to ``emu35 plan`` together. Step time and the search for layouts build on these.
"""
