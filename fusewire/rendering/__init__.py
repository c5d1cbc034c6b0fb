"""Pages and pictures of graphs.

page        the HTML page of a report (page.html, page.css, page.js)
pictures    pictures_recorded: has reports hold pictures of their all-reduces
drawing     lays a picture out as SVG
node_names  labels of nodes
"""
