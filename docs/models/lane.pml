/* The change feed: one writer's lane, closed by somebody else, read by a responder. protocols: Change feed. Code: db/lane.go, ocsp/feed.go.

   A transaction is a feed row (lane, seq) together with its fact; both or neither. It may commit, commit with its answer lost, or stay under way and land
   late. Another writer may take the fact's key at any time (a certificate finished elsewhere). The lane's writer appends events 1..EVENTS in turn. A
   closer closes the lane although the writer may live (it is a zombie then). The responder applies what continues its prefix.

   Rules that can be removed: -DTWOFLIGHT -DMAXREAD -DREUSE -DCLOSEMARK -DRELAYFACT */

#ifndef EVENTS
#define EVENTS 3
#endif
#define SEQS 5                   /* room for the events and the closing row */
#define CLOSED 9
#define MINE 1
#define OTHERS 2
byte row[SEQS];                  /* feed row at seq q+1: 0 none, 1..EVENTS the event, 9 closed */
byte fact[EVENTS+1];             /* the fact of event e: 0 none, MINE with the feed row, OTHERS taken by another writer */
byte under[SEQS];                /* a transaction under way at this seq: its event; 0 none */
bool acked[EVENTS+1];            /* Append said: committed */
bool denied[EVENTS+1];           /* Append said: not committed and never will be */
bool got[EVENTS+1]; bool ended=false; byte pos=0;   /* the responder */
#ifdef CLOSEMARK
bool mark=false;                 /* "closed" kept elsewhere than at tip+1 */
#endif

/* batch.insert in one transaction: whole, or not at all */
inline commit(q_,e_) {
#ifdef RELAYFACT
  if :: fact[e_]==0 -> fact[e_]=MINE :: else -> skip fi;             /* the fact in a transaction of its own */
  if :: row[q_]==0 && fact[e_]==MINE -> row[q_]=e_ :: else -> skip fi
#else
  if :: row[q_]==0 && fact[e_]==0 -> row[q_]=e_; fact[e_]=MINE :: else -> skip fi
#endif
}

proctype Writer() { byte q=0; byte e=1; bool sent=false;
#ifdef TWOFLIGHT
  /* numbers reserved for two transactions at once */
  under[0]=1; under[1]=2;
  do :: atomic { row[0]==1 && !acked[1] -> acked[1]=true } :: atomic { row[1]==2 && !acked[2] -> acked[2]=true } :: true -> break od
#else
  do
  :: e>EVENTS || q>=SEQS-1 -> break
  :: e<=EVENTS && q<SEQS-1 ->
     if                                                    /* Lane.commit: attempts.once */
     :: atomic { true -> commit(q,e); sent=true }
     :: atomic { under[q]==0 -> under[q]=e; sent=true }    /* ambiguous, may land late: replay the same rows */
     :: break                                              /* dies */
#ifdef REUSE
     :: atomic { sent -> denied[e]=true; e++; sent=false } /* gives an unsettled batch up and uses its number for the next */
#endif
     fi;
     if
     :: atomic { row[q]==e -> acked[e]=true; e++; q++; sent=false }        /* advance */
     :: atomic { row[q]==0 && fact[e]==OTHERS ->                          /* taken: drop, and number the rest anew */
                 denied[e]=true; e++; sent=false }
     :: row[q]==CLOSED -> break                                           /* compare: ErrLaneClosed */
     :: atomic { row[q]==0 && fact[e]!=OTHERS -> skip }                    /* not known: the same rows again */
     :: atomic { row[q]!=0 && row[q]!=e && row[q]!=CLOSED -> assert(false) } /* compare: ErrLaneOwner, without any copy of this machine */
     fi
  od
#endif
}
proctype Net() { byte k=0;
endN: do
  :: atomic { k<SEQS && under[k]!=0 -> commit(k,under[k]); under[k]=0; k=0 }
  :: atomic { k<SEQS-1 -> k++ }
  :: atomic { k>0 -> k=0 }
  od }
/* another CA node finishes the same requests, in its own lane */
proctype Other() { if :: atomic { fact[1]==0 -> fact[1]=OTHERS } :: atomic { fact[2]==0 -> fact[2]=OTHERS } :: skip fi }
/* db.closeLane: read the tip, insert closed at tip+1; a number taken meanwhile means one further */
proctype Closer() { byte q=0;
#ifdef CLOSEMARK
  mark=true
#else
  do
  :: row[q]!=0 && row[q]!=CLOSED -> q++
  :: row[q]==CLOSED -> break
  :: atomic { row[q]==0 -> row[q]=CLOSED }; break
  od
#endif
}
/* ocsp.follower.applyRow */
proctype Responder() { byte e;
  do
  :: ended -> break
#ifdef MAXREAD
  :: atomic { !ended && row[1]!=0 && pos<2 -> e=row[1]; pos=2; if :: e==CLOSED -> ended=true :: else -> got[e]=true fi }  /* up to the maximum, holes and all */
#endif
#ifdef CLOSEMARK
  :: atomic { !ended && mark && row[pos]==0 -> ended=true }
#endif
  :: atomic { !ended && row[pos]!=0 -> e=row[pos]; if :: e==CLOSED -> ended=true :: else -> got[e]=true; pos++ fi }
  od;
  /* the lane is closed: nothing of it may be missing, now or later */
endR: do :: assert((fact[1]!=MINE || got[1]) && (fact[2]!=MINE || got[2]) && (fact[3]!=MINE || got[3]) &&
             (!acked[1] || got[1]) && (!acked[2] || got[2]) && (!acked[3] || got[3])) od }
/* Append's promise */
proctype Promise() {
endP: do :: atomic { (denied[1] && fact[1]==MINE) || (denied[2] && fact[2]==MINE) || (denied[3] && fact[3]==MINE) -> assert(false) } od }
init { atomic { run Writer(); run Net(); run Other(); run Closer(); run Responder(); run Promise() } }
