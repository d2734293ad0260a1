"""Files and folders: how they are written so that nothing is lost, and read so that nothing is
taken for what it is not.

`whole_file` writes a single file, `whole_folder` writes and verifies a folder with a manifest,
`reading` reads bounded inputs, `lock` keeps two processes out of one folder. `disk` holds the steps
that these share. This package imports nothing of `hsa_mini`.
"""
