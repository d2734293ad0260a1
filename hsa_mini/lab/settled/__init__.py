"""The second round: more arms, longer runs, curves of learning, and how long all of it takes."""
