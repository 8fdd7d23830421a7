"""A blind vote on the page: two pictures of one prompt, whose makers are shown at the end.

Called by page.py. Which pairs come, in which order and on which side is fixed when the page is
made; the votes stay in the browser, which counts them with an interval and gives them as a file.
They outlast a reload and new makers: the page of a run that goes on reloads itself and grows.
Rounds that have a vote are not asked again. A grid that follows a vote shows who drew what, so it
is folded; whoever unfolds it, or asks who drew the pictures, has voted for the last time.
"""

import html
import itertools
import json
from collections.abc import Callable, Sequence

import numpy as np

from etude.core.rng import Stream, permute, uniform

MOST_ROUNDS = 60


def rounds(prompts: int, makers: int) -> list[tuple[int, int, int]]:
    """(prompt, left maker, right maker) of every round, mixed; the first so many of all pairs."""
    pairs = list(itertools.combinations(range(makers), 2))
    found = [(prompt, *pair) for prompt in range(prompts) for pair in pairs]
    order = permute(np.arange(len(found)), len(found), 0, Stream.VOTE, 0)
    swapped = uniform(0, Stream.VOTE, np.arange(len(found)), 1)[:, 0] < 0.5
    mixed = [
        (found[i][0], found[i][2], found[i][1]) if swap else found[i]
        for i, swap in zip(order.tolist(), swapped, strict=True)
    ]
    return mixed[:MOST_ROUNDS]


def vote_html(
    id: str,
    prompts: Sequence[str],
    makers: Sequence[str],
    files: Sequence[Sequence[str]],
    uri: Callable[[str], str],
) -> str:
    """The section's inside.

    Args:
        files: of every maker, a picture's file a prompt.
        uri: a file's content for the page.
    """
    data = {
        "prompts": list(prompts),
        "makers": list(makers),
        "pictures": [[uri(name) for name in of_maker] for of_maker in files],
        "rounds": rounds(len(prompts), len(makers)),
    }
    # "</" would end the script element early, and "<!--" open a comment in it.
    text = json.dumps(data).replace("<", "\\u003c")
    return (
        f'<div class="ballot" data-for="{html.escape(id)}"><p class="asked"></p>'
        '<div class="sides"><button type="button" class="left"><img alt="left picture"></button>'
        '<button type="button" class="right"><img alt="right picture"></button></div>'
        '<p><button type="button" class="tie">No difference</button> <span class="count"></span> '
        '<button type="button" class="end">Show who drew them</button></p>'
        '<div class="result" aria-live="polite"></div></div>'
        f'<script type="application/json" class="votes">{text}</script>'
    )


STYLE = """
.ballot .sides{display:flex;gap:14px}.ballot .sides button{flex:1;border:1px solid var(--rule);
border-radius:6px;background:none;padding:6px;cursor:pointer}
.ballot img{display:block;width:100%;image-rendering:pixelated}
.ballot p button{font:inherit;font-size:14px;color:var(--accent);background:none;cursor:pointer;
border:1px solid var(--rule);border-radius:99px;padding:3px 16px}
.ballot .sides button:disabled,.ballot p button:disabled{opacity:.5;cursor:default}
"""

# Wilson's interval of a share of decided votes; ties are counted beside.
SCRIPT = """
document.querySelectorAll('.ballot').forEach(function(box){
 var data=JSON.parse(box.parentNode.querySelector('script.votes').textContent),all=[];
 var kept='votes '+JSON.stringify([location.pathname,box.dataset.for]),given={};
 function known(v){return data.prompts.includes(v.prompt)&&data.makers.includes(v.left)
  &&data.makers.includes(v.right)}
 try{all=JSON.parse(sessionStorage.getItem(kept))||[]}catch(e){}
 var votes=all.filter(known); // the others wait: a plan that goes on shows its makers one by one
 function asked(prompt,one,other){return JSON.stringify([prompt].concat([one,other].sort()))}
 votes.forEach(function(v){var key=asked(v.prompt,v.left,v.right);given[key]=(given[key]||0)+1});
 // Prompts of the same words are rounds of their own: each vote answers one of them.
 var open=data.rounds.filter(function(r){
  var key=asked(data.prompts[r[0]],data.makers[r[1]],data.makers[r[2]]);
  if(given[key]){given[key]-=1;return false}return true});
 function q(s){return box.querySelector(s)}
 var ended=false;
 try{ended=sessionStorage.getItem('shown '+kept)==='yes'}catch(e){}
 function end(){ended=true;
  try{sessionStorage.setItem('shown '+kept,'yes')}catch(e){}
  ['.left','.right','.tie'].forEach(function(s){q(s).disabled=true});tell()}
 function show(){var over=!open.length;
  q('.sides').style.display=over?'none':'';q('.tie').style.display=over?'none':'';
  q('.count').textContent=votes.length+' of '+(votes.length+open.length)+' votes';
  if(over){tell();return}
  var r=open[0];q('.asked').textContent=data.prompts[r[0]];
  q('.left img').src=data.pictures[r[1]][r[0]];q('.right img').src=data.pictures[r[2]][r[0]]}
 function vote(side){if(ended)return;var r=open.shift();if(!r)return;
  var v={prompt:data.prompts[r[0]],left:data.makers[r[1]],right:data.makers[r[2]],
   better:side===0?'left':side===1?'right':'tie'};
  votes.push(v);all.push(v);
  try{sessionStorage.setItem(kept,JSON.stringify(all))}catch(e){}
  show()}
 function tell(){var pairs={};votes.forEach(function(v){
   var names=[v.left,v.right].sort(),key=names.join('\\u0000');
   var p=pairs[key]||(pairs[key]={names:names,won:[0,0],ties:0});
   if(v.better==='tie')p.ties+=1;else p.won[names.indexOf(v[v.better])]+=1});
  q('.result').textContent='';
  Object.keys(pairs).forEach(function(k){var p=pairs[k],n=p.won[0]+p.won[1],z=1.96;
   var line=document.createElement('p'),text=p.names[0]+' '+p.won[0]+', '+p.names[1]+' '+p.won[1]
    +', no difference '+p.ties;
   if(n){var s=p.won[0]/n,c=(s+z*z/(2*n))/(1+z*z/n);
    var h=z/(1+z*z/n)*Math.sqrt(s*(1-s)/n+z*z/(4*n*n)),lo=c-h,hi=c+h;
    text+='; '+p.names[0]+' is preferred in '+Math.round(100*s)+'% ['+Math.round(100*lo)+', '
     +Math.round(100*hi)+']'+(lo>0.5||hi<0.5?'':': not decided')}
   line.textContent=text;q('.result').appendChild(line)});
  if(votes.length){var a=document.createElement('a');a.textContent='Keep the votes as a file';
   a.download='votes.json';
   a.href='data:application/json,'+encodeURIComponent(JSON.stringify(votes,null,1));
   q('.result').appendChild(a)}}
 q('.left').onclick=function(){vote(0)};q('.right').onclick=function(){vote(1)};
 q('.tie').onclick=function(){vote(2)};q('.end').onclick=end;show();
 if(ended)end();
 var grid=box.parentNode.nextElementSibling;
 if(grid&&grid.classList.contains('grid')){
  var fold=document.createElement('details'),head=document.createElement('summary');
  head.textContent='Show the pictures with their makers, which ends the vote';fold.append(head);
  Array.from(grid.children).forEach(function(e){if(e.tagName!=='H3')fold.append(e)});
  grid.append(fold);fold.addEventListener('toggle',function(){if(fold.open)end()})}
});
"""
